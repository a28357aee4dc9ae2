"""The keeps of a sketched model, moved while it trains."""
