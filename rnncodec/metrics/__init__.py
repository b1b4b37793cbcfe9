"""How good a picture is (`distortion`), and how good a codec over its rates (`curves`); only the first needs torch."""
