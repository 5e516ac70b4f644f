"""What a model can do, measured: perplexity, tasks, few-shot, overlap, the ledger, attention."""
