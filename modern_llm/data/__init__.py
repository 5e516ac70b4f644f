"""Text and its tokens: sources, readers, tokenizers, packed rows, chats, pairs, problems, and the
built-in world.
"""
