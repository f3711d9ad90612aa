"""The method: from losses and gradient factors up to training and the editor."""
