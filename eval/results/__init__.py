"""Result files: their schemas, and what every one of them records."""
