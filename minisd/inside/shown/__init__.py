"""What is found inside, as a person sees it: SVG (svg), tables and plots of numbers (numerics), heat over pictures (heat), the
UNet as a drawing (unet_map), and the page of `minisd explain` (lecture collects what page, prose, page.css and page.js show)."""
