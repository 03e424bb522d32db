-- Each CT series that is stable goes to the node; what the node made itself is no CT and stays.
function OnStableSeries(seriesId, tags, metadata)
  if tags['Modality'] == 'CT' then
    RestApiPost('/modalities/node/store', DumpJson({ Resources = { seriesId }, Asynchronous = true }))
  end
end
