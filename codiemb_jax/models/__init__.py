"""Token ids -> one vector a text."""
