"""What trainings read: songs and folders of recordings, the excerpts that are drawn of them, batches, statistics.

Neither NNabla nor a network is known here. The rooms, each importing only those above it:

    augmentations  what may be done to the sources of a training mixture
    recordings     a stretch of an audio file; how it is read
    cache          what is decoded or resampled, once
    mixing         items: parts of recordings, mixed into a mixture and its targets
    sources        what every dataset has in common
    musdb18        MUSDB18's tracks
    manifest       songs that a CSV file lists
    songs          datasets of songs with stems: MUSDB18, a manifest
    layouts        the reference's datasets of folders: aligned, sourcefolder, trackfolder_var, trackfolder_fix
    batches        batches, prepared ahead
    statistics     mean and deviation of the mixtures' spectra
    inspection     a look at all of it before hours are spent

All that is drawn depends on (seed, epoch, index, source) alone: see randomness.py.
"""
