// `validatorUrl: null`: Swagger UI would show every document to a service on the internet.
SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", validatorUrl: null, deepLinking: true, defaultModelsExpandDepth: 0,
});
