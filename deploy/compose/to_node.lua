-- Each CT series that is stable goes to the node once; what the node made itself is no CT and stays.
function OnStableSeries(seriesId, tags, metadata)
  if tags['Modality'] == 'CT' then
    SendToModality(seriesId, 'node')
  end
end
