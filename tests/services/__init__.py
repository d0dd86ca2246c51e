"""Real services, and one imitation, for tests and demonstrations; all on 127.0.0.1."""
