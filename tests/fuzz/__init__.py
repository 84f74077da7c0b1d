"""What a hostile peer can send, and what must not come of it."""
