"""The page that a browser gets at `/`: index.html, style.css and the modules of page.js, as they are; routes.py answers what they
ask, stream.py tells of a drawing while it is made, recovered.py reads the recipe of a picture that is dropped there."""
