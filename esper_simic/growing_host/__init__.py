"""The growing-host environment: small networks that are really trained while a controller grows them."""
