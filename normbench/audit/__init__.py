"""The contract of a norm layer as checks that anybody's layer can be put through, by probing."""
