"""Models for others: files for other programs and places, and the card that says what a model is worth."""
