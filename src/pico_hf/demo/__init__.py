"""A page in the browser: words or an image in, ranked images out, and why each was found."""
