"""Models, their folders, and what is made of them."""
