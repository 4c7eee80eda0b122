"""One stack of Flax NNX layers and the three assemblies made from it."""
