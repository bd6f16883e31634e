"""Files of triples as people have them."""
