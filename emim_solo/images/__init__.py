"""Image folders: which files are images, which are held out, images that anyone can have."""
