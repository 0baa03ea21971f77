"""The demo: a small network learns handwritten digits, with batch norm and without.

`python -m nbbn demo` runs it. The modules, in the order in which to read them:

- `settings`: how it trains;
- `data`: the images;
- `layers`: convolution, rectifier, dense layer and loss, forward and backward, in NumPy;
- `network`: those layers and `nbbn.BatchNorm`, one after the other;
- `train`: gradient descent, and what is recorded on the way;
- `plots`: the two pictures;
- `run`: all of it, with a progress bar and a table.
"""
