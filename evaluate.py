"""Measures a codec on photographs, beside other codecs: whole files, five metrics, curves, tables and pictures.

    python evaluate.py PHOTOS --weights small --output results
    python evaluate.py PHOTOS --save-images                 with the decoded pictures, and a page to look at them
    python evaluate.py PHOTOS --baselines jpeg webp         beside these codecs only
    python evaluate.py KODAK --overlay toderici2017 mine/rnncodec-small.json      with curves of others
    python evaluate.py PHOTOS --coders                      the entropy coders on the same bits
    python evaluate.py PHOTOS --wandb NAME                  as a run of W&B as well, offline unless logged in

Each image is encoded once and its file decoded iteration by iteration; the bytes of iteration k are those of the file
cut to k iterations, bpp counts them over the true pixels, and curves are means over the images at equal setting. What
has been measured is remembered by the pixels of the image and the exact codec, so that a run that was stopped goes on.
With --save-images the other codecs are also measured at the settings that come closest to the bytes of each iteration.

The output folder gets points.csv (every image, codec and setting), mean.csv and summary.csv (areas under the curves and
BD-rate), a JSON for each codec in CompressAI's shape, rate_distortion.png and .svg, and if asked for coders.csv, the
pictures, comparisons and report.html.
"""

import sys

from rnncodec.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
