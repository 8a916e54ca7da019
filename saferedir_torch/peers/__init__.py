"""Other ways of keeping a model from drawing a concept, each written from its paper, to compare with on the same model."""
