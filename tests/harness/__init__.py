"""What the crash, concurrency and whole-job tests share: images with known bytes, caches, children, invariants."""
