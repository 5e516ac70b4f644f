"""A run's models as a server that clients of OpenAI's interface know, and a page to talk to them:
what `modern-llm serve` starts.
"""
