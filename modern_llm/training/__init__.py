"""Loss, optimizer, trainer and checkpoints, on one process or many; SFT, DPO and the verifier."""
