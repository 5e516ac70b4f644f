"""What a stage is, what it starts from, and how it is run, recorded and resumed."""
