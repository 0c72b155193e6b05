"""Every operator as its plain equation, in NumPy, and what executes them one by one (`eager`)."""
