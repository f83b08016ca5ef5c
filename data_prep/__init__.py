"""From a slide to a token file: slides, masks, frame, edges, tree, tokens and the file itself. Never imports torch."""
