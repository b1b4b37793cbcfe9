"""Measures a codec and other codecs on photographs, as `rnncodec evaluate` does.

    rnncodec evaluate PHOTOS --weights small --output results
    rnncodec evaluate PHOTOS --save-images              # also writes decoded pictures, and a page that shows them
    rnncodec evaluate PHOTOS --baselines jpeg webp      # with these other codecs only
    rnncodec evaluate KODAK --overlay toderici2017 mine/rnncodec-small.json     # with curves of other codecs
    rnncodec evaluate PHOTOS --coders                   # compares the entropy coders on the same bits
    rnncodec evaluate PHOTOS --wandb NAME               # also logs a run to W&B, offline unless logged in

Each image is encoded once, and its file is decoded iteration by iteration. The bytes of iteration k are those of the
file cut to k iterations, bpp counts them per pixel of the image, and curves are means over the images at equal
settings. Measurements are kept in a cache, so that a run that was stopped can be resumed. With --save-images, the other
codecs are also measured at the settings that come closest to the bytes of each iteration.

The output folder gets points.csv (every image, codec and setting), mean.csv, summary.csv (areas under the curves and
BD-rates), a JSON file for each codec in CompressAI's format, rate_distortion.png and .svg, and on request coders.csv,
the pictures, comparisons and report.html.
"""

import sys

from rnncodec.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
