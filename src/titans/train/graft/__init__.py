"""Training of a graft's memories: on cached features of its base, or through the base."""
