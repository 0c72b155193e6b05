"""What is measured: speed, perplexity, what a file and a memory hold, what the machine offers; and plots of it."""
