"""KV transfer between workers: sessions, and the transports behind one interface."""
