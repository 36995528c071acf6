"""Models that map token ids to one embedding per text."""
