"""The machinery that any training program needs. A reader of the paper opens none of it."""
