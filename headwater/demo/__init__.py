"""The embedded demo: drawings by fictional studios, and the corpus a tiny model learnt from."""
