"""What a token's experts gave, weighted and added."""
