"""Text, chats, prompts and task data, read from files."""
