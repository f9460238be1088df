"""Image folders: which files are images, which images are held out of training, and freely available images."""
