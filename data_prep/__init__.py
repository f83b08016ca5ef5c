"""From a slide to a token file: readers, frame, edges, quadtree, tokens and the file itself. Never imports torch."""
