"""Text -> token ids, laid out in rows."""
