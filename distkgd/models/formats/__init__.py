"""Tables in fewer bytes."""
