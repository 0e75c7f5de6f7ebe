"""How networks are computed: precision, memory format, compilation, and trials that choose among them."""
