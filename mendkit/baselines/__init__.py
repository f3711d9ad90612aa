"""What a trained editor has to beat."""
