"""The tensor-train mathematics: integers (`shapes`), decomposition, algebra, contraction."""
