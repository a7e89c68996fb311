"""Pictures and files of pictures: init images and masks, PNGs with their metadata, sheets of several, previews."""
