"""dense2sparse: convert a dense GQA language model to MiniMax Sparse Attention."""

__version__ = "0.1.0"
