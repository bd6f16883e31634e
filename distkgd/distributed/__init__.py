"""The ranks, and what is spread over them."""
