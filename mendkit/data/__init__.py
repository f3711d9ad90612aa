"""What is to be edited: examples, published layouts, files. No torch."""
