"""One run and many: what is built, the epochs, what they leave, who may work where, and how a sweep ends."""
