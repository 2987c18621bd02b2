"""Controllers of growth: graph encoder, recurrent core, factored heads, running normalisation."""
