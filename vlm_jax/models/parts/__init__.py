"""What several families are made of and is none itself."""
