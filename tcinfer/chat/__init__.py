"""Conversations: a chat template rendered safely, turns, undo, files, and the terminal."""
